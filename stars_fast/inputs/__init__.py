"""What users give, checked and turned into what the loop runs: arguments, models, sampling, hooks."""
