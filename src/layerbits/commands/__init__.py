"""What the entry scripts run: a configuration in, a result on disk and in the tracking store out."""
