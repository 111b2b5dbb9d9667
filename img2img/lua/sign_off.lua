-- Forgets a worker that holds nothing, and rings once for the wake token that it may have taken. ARGV: queue, worker
forget_worker(ARGV[2])
redis.call('DEL', P .. 'control:' .. ARGV[2])
wake(OWN)
