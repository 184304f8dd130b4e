"""Label diffusion: schedule, objectives, sampling, and the pipeline that users load."""
