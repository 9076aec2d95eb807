-- Sends the requests of a file one after the other, each once; prints what came as one JSON line.
-- The file holds whole HTTP requests with a NUL behind each.
local threads = {}
function setup(thread) table.insert(threads, thread) end
function init(args)
  requests, sent, ran_out = {}, 0, 0
  local file = assert(io.open(args[1], "rb"))
  local whole = file:read("*a")
  file:close()
  for one in whole:gmatch("([^%z]+)%z") do requests[#requests + 1] = one end
  once = args[2] == "once"
end
function request()
  sent = sent + 1
  if sent > #requests then
    if once then ran_out = 1 end
    return requests[(sent - 1) % #requests + 1]
  end
  return requests[sent]
end
function done(summary, latency, _)
  local out_of = 0
  for _, thread in ipairs(threads) do out_of = out_of + thread:get("ran_out") end
  local e = summary.errors
  io.write(string.format(
    '{"requests": %d, "duration_us": %d, "p50_us": %d, "p99_us": %d, "p95_us": %d, "non_2xx": %d, "errors": %d, "ran_out": %d}\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99), latency:percentile(95),
    e.status, e.connect + e.read + e.write + e.timeout, out_of))
end
