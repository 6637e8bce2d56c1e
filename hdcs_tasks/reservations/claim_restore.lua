-- needs: epoch_guard, span, claims
-- Give a VM back what it is seen to use on a server node and holds no claim on: capacity, console port and IP, just
-- these, all or none; also where nothing is free. Returns 'ok' (it may hold them already), or whose they are:
-- 'port <VM>', 'ip <VM>'; 'no node': the server node is in no pool.
--
-- KEYS[1]  epoch:run_id
-- KEYS[2]  pool:<domain node>     zset   see pool_put.lua
-- KEYS[3]  claims:<domain node>   hash   see claims.lua
-- KEYS[4]  node:<server node>     hash   see pool_put.lua
-- KEYS[5]  ports:<domain node>    see span.lua
-- KEYS[6]  ips:<server node>      see span.lua
-- ARGV     vm, server node, vcpus, memory_mib, port or 0, ip or 0
local vm, node, vcpus, memory, port, ip = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5], ARGV[6]
local claims = claims_read(redis.call('HGET', KEYS[3], vm))
for _, claim in ipairs(claims) do
  if claim.node == node then return 'ok' end
end

-- Another VM that owns the number and may still use it; one whose number only cools, and that holds no claim again, has
-- no more need of it.
local function owner_of(base, number)
  local pairs_ = redis.call('HGETALL', base)
  for i = 1, #pairs_, 2 do
    local other = pairs_[i]
    if pairs_[i + 1] == number and other ~= vm and string.sub(other, 1, 1) ~= ':' then
      if not redis.call('ZSCORE', base .. ':cooling', other) or redis.call('HEXISTS', KEYS[3], other) == 1 then
        return other
      end
      redis.call('HDEL', base, other)
      redis.call('ZREM', base .. ':cooling', other)
    end
  end
end

local function give(base, number)
  local old, last_given = unpack(redis.call('HMGET', base, vm, ':next'))
  redis.call('ZREM', base .. ':cooling', vm)
  if old == number then return end
  if old then redis.call('RPUSH', base .. ':free', old) end
  redis.call('LREM', base .. ':free', 0, number)
  if last_given and tonumber(number) > tonumber(last_given) then
    for skipped = last_given + 1, number - 1 do
      redis.call('RPUSH', base .. ':free', string.format('%.0f', skipped))
    end
    redis.call('HSET', base, ':next', number)
  end
  redis.call('HSET', base, vm, number)
end

local facts = redis.call('HMGET', KEYS[4], 'vcpus', 'memory_mib', 'used_vcpus', 'used_memory_mib', 'schedulable')
if not facts[1] then return 'no node' end
local other = port ~= '0' and owner_of(KEYS[5], port)
if other then return 'port ' .. other end
other = ip ~= '0' and owner_of(KEYS[6], ip)
if other then return 'ip ' .. other end
if port ~= '0' then give(KEYS[5], port) end
if ip ~= '0' then give(KEYS[6], ip) end
claims[#claims + 1] = {node = node, vcpus = vcpus, memory = memory, port = tonumber(port), ip = tonumber(ip), step = ''}
claims_write(KEYS[3], vm, claims)
local used_vcpus, used_memory = facts[3] + vcpus, facts[4] + memory
redis.call('HSET', KEYS[4], 'used_vcpus', used_vcpus, 'used_memory_mib', used_memory)
pool_rank(KEYS[2], node, facts[1] - used_vcpus, facts[2] - used_memory, facts[5] == '1')
return 'ok'
