"""How it trains: the loop, DeepSpeed set-up, EMA, schedules, checkpoints, guards, signals."""
