"""What Lightning needs around a model: trainer, loggers, callbacks, resuming."""
