"""The phase `sample`: every prediction of the study, in shards that are gathered."""
