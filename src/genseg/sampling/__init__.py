"""The phase `sample`: all predictions of the trained models, sampled in shards that are then gathered."""
