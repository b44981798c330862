-- KEYS: entry hash, index. ARGV: key, expected. Answers {1, version deleted or ''} or {0, version there or ''}.
local found = redis.call('HGET', KEYS[1], 'v')
if (ARGV[2] == 'absent' and found) or (ARGV[2] ~= 'absent' and ARGV[2] ~= 'any' and ARGV[2] ~= found) then
  return {0, found or ''}
end
redis.call('DEL', KEYS[1])
redis.call('ZREM', KEYS[2], ARGV[1])
return {1, found or ''}
