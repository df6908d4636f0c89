"""Between the axes: the gradients of one step, measured, decided on and scaled."""
