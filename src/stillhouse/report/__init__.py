"""The report of a run: one offline HTML page with numbers, charts and texts."""
