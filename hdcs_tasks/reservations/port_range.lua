-- needs: epoch_guard, span
-- Give a domain node its console-port range, overlapping no other's. Returns {first, last}, {0, 0} where no room is
-- left (allot), or {-1, 0, domain node in the way} (set).
--
-- KEYS[1]  epoch:run_id
-- KEYS[2]  port_ranges:all       hash   domain node -> "<first>-<last>"
-- KEYS[3]  ports:<domain node>   see span.lua; its bounds are the range
-- ARGV     domain node, verb, first, last, size:  set (exactly first..last) | allot (lowest free window of `size`)
local ranges = {}
for _, pair in ipairs({redis.call('HGETALL', KEYS[2])}) do
  for i = 1, #pair, 2 do
    local first, last = string.match(pair[i + 1], '^(%d+)-(%d+)$')
    ranges[#ranges + 1] = {name = pair[i], first = tonumber(first), last = tonumber(last)}
  end
end
table.sort(ranges, function(a, b) return a.first < b.first end)

local function in_the_way(first, last)
  for _, r in ipairs(ranges) do
    if r.name ~= ARGV[1] and r.first <= last and first <= r.last then
      return r
    end
  end
end

local old
for _, r in ipairs(ranges) do
  if r.name == ARGV[1] then old = r end
end
local first, last = tonumber(ARGV[3]), tonumber(ARGV[4])
if ARGV[2] == 'allot' then
  if old then
    return {old.first, old.last}
  end
  local size, limit = tonumber(ARGV[5]), last
  repeat
    last = first + size - 1
    local other = in_the_way(first, last)
    if other then first = other.last + 1 end
  until not other or first > limit
  if last > limit or first > limit then
    return {0, 0}
  end
else
  local other = in_the_way(first, last)
  if other then
    return {-1, 0, other.name}
  end
  if old and old.first == first and old.last == last then
    return {first, last}
  end
end
redis.call('HSET', KEYS[2], ARGV[1], first .. '-' .. last)
span_bounds(KEYS[3], first, last)
return {first, last}
