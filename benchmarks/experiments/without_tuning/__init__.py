"""Ways to clip on many trainings, without tuning anything for one of them."""
