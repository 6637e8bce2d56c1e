-- needs: span
-- Start the cooling of a VM's console port. Returns 1, or 0 where it has none.
--
-- KEYS[1]  ports:<domain node>   see span.lua
-- ARGV     vm, cooling_ms
return span_cool(KEYS[1], ARGV[1], tonumber(ARGV[2])) and 1 or 0
