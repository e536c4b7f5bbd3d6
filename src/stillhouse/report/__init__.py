"""A run's report: one offline HTML page with numbers, charts, and texts."""
