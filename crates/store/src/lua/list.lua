-- KEYS: index. ARGV: prefix of keys, prefix of entry hashes, most entries, most bytes.
-- Answers {0, key, version, value, key, ...}, or {1, size} for too many entries, {2, size} for too many bytes.
local high = ARGV[1] == '' and '+' or '[' .. ARGV[1] .. '\255'
local low = ARGV[1] == '' and '-' or '[' .. ARGV[1]
local keys = redis.call('ZRANGEBYLEX', KEYS[1], low, high, 'LIMIT', 0, tonumber(ARGV[3]) + 1)
if #keys > tonumber(ARGV[3]) then
  return {1, #keys}
end
local answer, size = {0}, 0
for _, key in ipairs(keys) do
  local found = redis.call('HMGET', ARGV[2] .. key, 'v', 'b')
  if found[1] then
    size = size + #found[2]
    if size > tonumber(ARGV[4]) then
      return {2, size}
    end
    answer[#answer + 1] = key
    answer[#answer + 1] = found[1]
    answer[#answer + 1] = found[2]
  end
end
return answer
