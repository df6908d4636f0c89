"""The life of a hook: optimizers, their steps and closures, skipped steps, GradScaler."""
