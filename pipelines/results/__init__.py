"""From a finished cell to the tables: records, counts, MLflow, tables and figures."""
