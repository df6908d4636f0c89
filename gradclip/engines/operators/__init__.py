"""The engine made of torch operators: any device, no compiler."""
