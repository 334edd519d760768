"""For notebooks and plug-ins."""
from cli.plugins import algorithm, backbone, dataset, metric, sampler, schedule
__all__ = ["algorithm", "backbone", "dataset", "metric", "sampler", "schedule"]
