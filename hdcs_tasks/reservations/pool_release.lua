-- needs: span, claims
-- Give back what a VM holds on a server node: capacity at once, the IP after cooling; with its last claim in the
-- domain node, where asked, start the cooling of its port. Returns 1, or 0 where it holds nothing there.
--
-- KEYS[1]  pool:<domain node>     zset   see pool_put.lua
-- KEYS[2]  claims:<domain node>   hash   see claims.lua
-- KEYS[3]  node:<server node>     hash   see pool_put.lua; may be gone
-- KEYS[4]  ips:<server node>      see span.lua
-- KEYS[5]  starts:<server node>   zset   see pool_place.lua
-- KEYS[6]  ports:<domain node>    see span.lua
-- KEYS[7]  starting:<domain node> zset   see pool_place.lua
-- KEYS[8]  step:<step>            hash   see step_claim.lua; read only with a fence
-- ARGV     vm, server node, ip_cooling_ms, port_cooling_ms or '': the caller sees to the port,
--          '=<step>': only a claim made by that step, or '': any,
--          the fence: attempt and holder that must have the step in hand, or '' and '': none
if ARGV[6] ~= '' then
  local attempt, holder = unpack(redis.call('HMGET', KEYS[8], 'attempt', 'holder'))
  if attempt ~= ARGV[6] or holder ~= ARGV[7] then return 0 end
end
local kept, gone, elsewhere = {}, nil, true
for _, claim in ipairs(claims_read(redis.call('HGET', KEYS[2], ARGV[1]))) do
  local fits = ARGV[5] == '' or ARGV[5] == '=' .. claim.step
  if claim.node == ARGV[2] then elsewhere = false end
  if claim.node == ARGV[2] and fits then gone = claim else kept[#kept + 1] = claim end
end
if #kept == 0 and ARGV[4] ~= '' then
  span_cool(KEYS[6], ARGV[1], tonumber(ARGV[4]))
end
if not gone then
  if elsewhere then span_cool(KEYS[4], ARGV[1], tonumber(ARGV[3])) end  -- an IP without a claim (address_take.lua)
  return 0
end
claims_write(KEYS[2], ARGV[1], kept)
redis.call('ZREM', KEYS[5], ARGV[1])
redis.call('ZREM', KEYS[7], ARGV[1])
span_cool(KEYS[4], ARGV[1], tonumber(ARGV[3]))
local facts = redis.call('HMGET', KEYS[3], 'vcpus', 'memory_mib', 'used_vcpus', 'used_memory_mib', 'schedulable')
if facts[1] then
  local used_vcpus, used_memory = facts[3] - gone.vcpus, facts[4] - gone.memory
  redis.call('HSET', KEYS[3], 'used_vcpus', used_vcpus, 'used_memory_mib', used_memory)
  pool_rank(KEYS[1], ARGV[2], facts[1] - used_vcpus, facts[2] - used_memory, facts[5] == '1')
end
return 1
