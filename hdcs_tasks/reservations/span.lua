-- Library: numbers out of a span [first, last], each owned by one VM, cooling after use. Ports and IPs both.
--
-- <base>           hash   VM -> number, owned or cooling; and of the span itself ':first', ':last' (its bounds) and
--                         ':next', the highest number ever given out by the cursor. No VM's name begins with ':'
-- <base>:cooling   zset   VM -> time (ms) from which its number may go to another VM
-- <base>:free      list   numbers used before and free again, longest-free first
--
-- All of a span that a take needs stands in one hash: one read and one write.
local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

-- A number that was used before: a free one, else a ripe one; or nil. It has no owner yet.
-- `held`: a hash whose VMs keep their number although it is cooling (they hold a claim again), or nil.
-- `mine`: a set of VMs that are about to take their own number back, or nil.
local function span_used_before(base, first, last, held, mine)
  local number
  repeat
    number = tonumber(redis.call('LPOP', base .. ':free') or nil)
  until not number or (number >= first and number <= last)
  if number then return number end
  for _, old in ipairs(redis.call('ZRANGEBYSCORE', base .. ':cooling', '-inf', now_ms(), 'LIMIT', 0, 8)) do
    if not (mine and mine[old]) and not (held and redis.call('HEXISTS', held, old) == 1) then
      number = tonumber(redis.call('HGET', base, old) or nil)
      redis.call('ZREM', base .. ':cooling', old)
      redis.call('HDEL', base, old)
      if number and number >= first and number <= last then return number end
    end
  end
end

-- The VM's own number (taken back if it was cooling), else one never used, else one used before; or nil. True with it
-- where the VM did not own it before.
local function span_take(base, vm, held)
  local found = redis.call('HMGET', base, vm, ':next', ':last')
  if found[1] then
    redis.call('ZREM', base .. ':cooling', vm)
    return tonumber(found[1])
  end
  if not found[3] then return nil end
  local number, last = found[2] + 1, tonumber(found[3])
  if number <= last then
    local text = string.format('%d', number)  -- Redis 7.0 prints numbers slowly: once instead of twice
    redis.call('HSET', base, vm, text, ':next', text)
    return number, true
  end
  number = span_used_before(base, tonumber(redis.call('HGET', base, ':first')), last, held)
  if number then redis.call('HSET', base, vm, number) end
  return number, true
end

-- The VM's number may go to another VM after cooling_ms. False where the VM has none.
local function span_cool(base, vm, cooling_ms)
  if redis.call('HEXISTS', base, vm) == 0 then
    return false
  end
  redis.call('ZADD', base .. ':cooling', 'NX', now_ms() + cooling_ms, vm)
  return true
end

-- Move up to `most` ripe numbers to the free list; returns how many.
local function span_reclaim(base, most)
  local first, last = unpack(redis.call('HMGET', base, ':first', ':last'))
  local ripe = redis.call('ZRANGEBYSCORE', base .. ':cooling', '-inf', now_ms(), 'LIMIT', 0, most)
  for _, vm in ipairs(ripe) do
    local number = tonumber(redis.call('HGET', base, vm) or nil)
    redis.call('ZREM', base .. ':cooling', vm)
    redis.call('HDEL', base, vm)
    if number and first and number >= tonumber(first) and number <= tonumber(last) then
      redis.call('RPUSH', base .. ':free', number)
    end
  end
  return #ripe
end

-- How many VMs own a number, cooling ones included.
local function span_owners(base)
  return redis.call('HLEN', base) - (redis.call('HEXISTS', base, ':next') == 1 and 3 or 0)
end

-- Give the span its bounds, or others. Who owns a number outside them keeps it until it gives it back.
local function span_bounds(base, first, last)
  redis.call('HDEL', base, ':first', ':last', ':next')
  redis.call('DEL', base .. ':free')
  local owned, highest = {}, first - 1
  for _, number in ipairs(redis.call('HVALS', base)) do owned[number] = true end
  if next(owned) then  -- the cursor cannot know what lies between: list what is free, once
    for number = first, last do
      local text = string.format('%.0f', number)
      if not owned[text] then redis.call('RPUSH', base .. ':free', text) end
    end
    highest = last
  end
  redis.call('HSET', base, ':first', first, ':last', last, ':next', highest)
end
