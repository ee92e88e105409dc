"""Tables and figures from results files; torch is never needed."""
