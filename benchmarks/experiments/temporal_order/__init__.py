"""The temporal order problem of Pascanu, Mikolov and Bengio (2013), clipped and unclipped."""
