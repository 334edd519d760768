"""Prior -> step -> sample: how tokens are drawn from what a model believes."""
