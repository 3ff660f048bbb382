"""What a run will need on other machines than this one: memory, traffic, time, and how it scales."""
