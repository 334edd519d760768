"""Numbers about text and samples; nothing here knows a model class of ours."""
