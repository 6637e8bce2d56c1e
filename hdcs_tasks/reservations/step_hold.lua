-- What the holder of an attempt does with it. Returns 1, or 0 where the attempt is not (or no longer) the holder's.
--
-- KEYS[1]  step:<step>         hash EX     attempt, holder, node, done, handed, percent, phase, eta_s
-- KEYS[2]  lease:step:<step>   string PX   the holder
-- ARGV     attempt, holder, verb, …:  renew ttl_ms | hand_over | finish | progress percent phase eta_s
local attempt, holder, done, handed = unpack(redis.call('HMGET', KEYS[1], 'attempt', 'holder', 'done', 'handed'))
local verb = ARGV[3]
if attempt ~= ARGV[1] then return 0 end
if verb == 'hand_over' and not holder and handed == ARGV[2] then return 1 end  -- the answer was lost, asked again
if holder ~= ARGV[2] then return 0 end
if done then return verb == 'finish' and 1 or 0 end
if verb == 'renew' then
  redis.call('SET', KEYS[2], holder, 'PX', ARGV[4])
elseif verb == 'hand_over' then
  redis.call('HDEL', KEYS[1], 'holder', 'node')
  redis.call('HSET', KEYS[1], 'handed', holder)
  redis.call('DEL', KEYS[2])
elseif verb == 'finish' then
  redis.call('HSET', KEYS[1], 'done', 1)
  redis.call('DEL', KEYS[2])
elseif verb == 'progress' then
  redis.call('HSET', KEYS[1], 'percent', ARGV[4], 'phase', ARGV[5], 'eta_s', ARGV[6])
else
  return redis.error_reply('step_hold.lua: no verb ' .. verb)
end
return 1
