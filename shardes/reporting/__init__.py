"""What a person sees: metrics, progress, loggers, report page."""
