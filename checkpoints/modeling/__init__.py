"""Files that `mode=export` copies beside a checkpoint.

They run by themselves, with torch and transformers; nothing here imports them.
"""
