"""Tables and figures from results files, without torch."""
