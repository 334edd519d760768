"""Networks, head and loss, noise schedules, EMA; nothing here knows an algorithm."""
