"""What a person runs beside the pipeline, one file a command."""
