-- KEYS[1]: lease hash. ARGV: holder, term, ttl in ms (0 releases). Answers 1, or 0 if the lease is lost.
local found = redis.call('HMGET', KEYS[1], 'term', 'holder')
if found[1] ~= ARGV[2] or found[2] ~= ARGV[1] then
  return 0
end
if ARGV[3] == '0' then
  redis.call('HSET', KEYS[1], 'holder', '', 'until', '0')
  return 1
end
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
redis.call('HSET', KEYS[1], 'ttl', ARGV[3], 'until', string.format('%.0f', now + tonumber(ARGV[3])))
return 1
