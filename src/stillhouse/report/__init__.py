"""The run's account for people: one offline HTML page with numbers, charts and texts."""
