-- Upkeep by a process that does not claim. ARGV: queue. Returns ms until more is due, or -1.
sweep()
return next_due()
