"""What a run reports: metrics, tables, plots and dashboards."""
