"""From the name of a data set to rows of token ids; nothing here knows an algorithm."""
