-- KEYS: entry hash, index, version counter. ARGV: key, expected ('any', 'absent' or a version), value.
-- Answers {1, version} or {0, version there or ''}.
local found = redis.call('HGET', KEYS[1], 'v')
if (ARGV[2] == 'absent' and found) or (ARGV[2] ~= 'absent' and ARGV[2] ~= 'any' and ARGV[2] ~= found) then
  return {0, found or ''}
end
-- At least the time in microseconds: a server that lost its data does not give out old versions again.
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
local version = string.format('%.0f', math.max(tonumber(redis.call('GET', KEYS[3]) or '0') + 1, now))
redis.call('SET', KEYS[3], version)
redis.call('HSET', KEYS[1], 'v', version, 'b', ARGV[3])
redis.call('ZADD', KEYS[2], 0, ARGV[1])
return {1, version}
