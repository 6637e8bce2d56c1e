-- Library: what a VM holds in a domain node, as text "node,vcpus,memory_mib,port,ip,step" joined by ';'.
--
-- claims:<domain node>   hash   VM -> its one or two claims (two while it migrates); port and ip 0 where not taken,
--                               ip as an unsigned 32-bit number
local function claims_read(text)
  local claims = {}
  for node, vcpus, memory, port, ip, step in string.gmatch(text or '', '([^,;]+),(%d+),(%d+),(%d+),(%d+),([^,;]*)') do
    claims[#claims + 1] = {node = node, vcpus = tonumber(vcpus), memory = tonumber(memory),
                           port = tonumber(port), ip = tonumber(ip), step = step}
  end
  return claims
end

local function claims_write(key, vm, claims)
  if #claims == 0 then
    redis.call('HDEL', key, vm)
    return
  end
  local parts = {}
  for i, c in ipairs(claims) do
    parts[i] = string.format('%s,%d,%d,%d,%.0f,%s', c.node, c.vcpus, c.memory, c.port, c.ip, c.step)
  end
  redis.call('HSET', key, vm, table.concat(parts, ';'))
end

-- Put the server node where its free amounts say in the pool's order. Nothing free or not schedulable: not in it.
local function pool_rank(pool_key, node, free_vcpus, free_memory, schedulable)
  if schedulable and free_vcpus > 0 and free_memory > 0 then
    redis.call('ZADD', pool_key, free_memory * 65536 + math.min(free_vcpus, 65535), node)
  else
    redis.call('ZREM', pool_key, node)
  end
end
