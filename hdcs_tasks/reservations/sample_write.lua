-- Write one server node's sample: its newest, and a row in front of the history of the host and of each VM.
-- One call for all of them: three commands per VM would cost the caller more than measuring did. Returns Redis's time.
--
-- KEYS[1]     sample:node:<server node>   string PX   the newest sample
-- KEYS[2...]  sample:host:<server node>, sample:vm:<vm id>   list PX   rows, newest first
-- ARGV        kept, ttl_ms, the sample, then a row for each of KEYS[2...]
redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[2])
local last = ARGV[1] - 1
for i = 2, #KEYS do
  redis.call('LPUSH', KEYS[i], ARGV[i + 2])
  redis.call('LTRIM', KEYS[i], 0, last)
  redis.call('PEXPIRE', KEYS[i], ARGV[2])
end
return redis.call('TIME')
