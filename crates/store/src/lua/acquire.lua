-- KEYS[1]: lease hash. ARGV: holder, ttl in ms, lowest term. Answers {1, term} or {0, term, remaining ms, holder}.
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local found = redis.call('HMGET', KEYS[1], 'term', 'holder', 'until', 'ttl')
local last = tonumber(found[1] or '0')
local remaining = tonumber(found[3] or '0') - now
-- A server clock that was set back must not prolong a lease beyond its time-to-live.
local ttl = tonumber(found[4] or '0')
if remaining > ttl then
  remaining = ttl
  redis.call('HSET', KEYS[1], 'until', string.format('%.0f', now + ttl))
end
if remaining > 0 and found[2] and found[2] ~= '' and found[2] ~= ARGV[1] then
  return {0, string.format('%.0f', last), string.format('%.0f', remaining), found[2]}
end
local term = string.format('%.0f', math.max(last + 1, tonumber(ARGV[3])))
redis.call('HSET', KEYS[1], 'term', term, 'holder', ARGV[1], 'ttl', ARGV[2],
  'until', string.format('%.0f', now + tonumber(ARGV[2])))
return {1, term}
