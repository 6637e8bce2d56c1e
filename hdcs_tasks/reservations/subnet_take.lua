-- needs: epoch_guard
-- Give a server node the lowest free subnet of the supernet. Returns the first address as a number, or -1: none free.
-- A node that has one keeps it, whatever the supernet says now.
--
-- KEYS[1]  epoch:run_id
-- KEYS[2]  subnet:of_node   hash   server node -> "<first address as a number>/<prefix>"
-- ARGV     server node, first address of the supernet, its size, prefix, size of one subnet
local own = redis.call('HGET', KEYS[2], ARGV[1])
if own then
  return own
end
local base, total, size = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[5])
local taken = {}
for _, text in ipairs(redis.call('HVALS', KEYS[2])) do
  local first, prefix = string.match(text, '^(%d+)/(%d+)$')
  first = tonumber(first)
  local last = first + 2 ^ (32 - tonumber(prefix)) - 1
  for block = math.floor((first - base) / size), math.floor((last - base) / size) do
    taken[block] = true
  end
end
for block = 0, math.floor(total / size) - 1 do
  if not taken[block] then
    local text = string.format('%.0f/%s', base + block * size, ARGV[4])
    redis.call('HSET', KEYS[2], ARGV[1], text)
    return text
  end
end
return ''
