"""The modes that measure a checkpoint, and downstream tasks."""
