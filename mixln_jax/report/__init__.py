"""Reports: the results of runs as text, HTML and figures."""
