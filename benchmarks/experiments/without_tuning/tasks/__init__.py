"""The trainings: data, models and optimizers."""
