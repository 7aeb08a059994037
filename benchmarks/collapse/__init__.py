"""The experiment of docs/results/collapse/README.md: at which peak rates networks with Post-LN layers collapse."""
