"""Many GPUs, or few: sharding, adapters, and what an update costs before anybody pays for it."""
