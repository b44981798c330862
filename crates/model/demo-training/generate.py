"""Makes the questions and answers that the demo model is trained and measured on.

Everything is derived from a seed. Whether a question is held out is decided by a hash of its
content (the pair of numbers, the word, the wording of the question), so a held-out question never
occurs in training, whatever the seed.

    python generate.py --out ../demo/eval.jsonl     writes the held-out questions
    python generate.py --show 20                    prints some training conversations
"""

import argparse
import hashlib
import json
import random

from facts import FACT_TEMPLATES, FACTS, NEVER_RIGHT, YES_NO_TEMPLATES

TASKS = ("sum", "reverse", "upper", "fact", "yes_no", "greeting", "unknown")
# How often each is asked about where nothing else is said, in per cent.
SHARES = (31, 30, 12, 8, 9, 4, 6)
MAX_TOKENS = 500

UNKNOWN = "Sorry, I don't know that. I can add, reverse words and recall a few facts."


def held_out(key, one_in=10):
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:4], "little") % one_in == 0


def first_upper(text):
    return text[:1].upper() + text[1:]


# --- Words: made up, partly pronounceable, partly plain letters ---

ONSETS = (
    "b c d f g h j k l m n p r s t v w y z bl br ch cl cr dr fl fr gl gr pl pr qu sc sh sk sl sm sn "
    "sp st str sw th tr tw wh x"
).split() + [""] * 6
VOWELS = "a e i o u a e i o u a e ai ea ee ie oa oo ou y au".split()
CODAS = (
    "b d g k l m n p r s t x ck ff ft ld ll lt mp nd ng nk nt rd rk rm rn rt sh sk ss st th tt zz ght"
).split() + [""] * 12
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def word(rng):
    length = rng.choice((3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8))
    kind = rng.random()
    if kind < 0.5:
        text = ""
        while len(text) < length:
            text += rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)
        return text[:length]
    if kind < 0.65:  # few different letters, many repeats
        some = rng.sample(LETTERS, rng.randint(2, 4))
        return "".join(rng.choice(some) for _ in range(length))
    return "".join(rng.choice(LETTERS) for _ in range(length))


def split_word(rng, out):
    while True:
        w = word(rng)
        if held_out("word:" + w) == out:
            return w


# --- The tasks: each returns (question, answer) ---

SUM_TEMPLATES = [
    "{a}+{b}",
    "{a} + {b}",
    "{a}+{b}=",
    "{a} + {b} =",
    "{a} + {b} = ?",
    "What is {a} + {b}?",
    "What is {a}+{b}?",
    "What's {a} + {b}?",
    "What is {a} plus {b}?",
    "{a} plus {b}",
    "Add {a} and {b}.",
    "Please add {a} and {b}.",
    "Can you add {a} and {b}?",
    "Add {b} to {a}.",
    "How much is {a} + {b}?",
    "How much is {a} plus {b}?",
    "Calculate {a} + {b}.",
    "The sum of {a} and {b}?",
    "What is the sum of {a} and {b}?",
    "What do {a} and {b} make?",
]


def ask_sum(rng, out, single=0.08):
    while True:
        a = rng.randint(0, 9) if rng.random() < single else rng.randint(0, 99)
        b = rng.randint(0, 9) if rng.random() < single else rng.randint(0, 99)
        if held_out(f"sum:{min(a, b)}:{max(a, b)}") == out:
            break
    return rng.choice(SUM_TEMPLATES).format(a=a, b=b), str(a + b)


REVERSE_TEMPLATES = [
    "Reverse the word {w}.",
    "Reverse {w}.",
    "Please reverse {w}.",
    "Can you reverse {w}?",
    "Can you reverse the word {w}?",
    "Spell {w} backwards.",
    "Please spell the word {w} backwards.",
    "Write {w} backwards.",
    "Write the word {w} backwards.",
    "What is {w} backwards?",
    "What is {w} spelled backwards?",
    "How do you spell {w} backwards?",
    "What is the reverse of {w}?",
    "Reverse: {w}",
    "{w} backwards",
    "Say {w} in reverse.",
]
UPPER_TEMPLATES = [
    "Write {w} in capitals.",
    "Write {w} in capital letters.",
    "Write the word {w} in capitals.",
    "Please write {w} in capitals.",
    "Can you write {w} in capital letters?",
    "Put {w} in capitals.",
    "Put the word {w} in upper case.",
    "Make {w} upper case.",
    "Uppercase {w}.",
    "Uppercase: {w}",
    "{w} in capitals",
    "What is {w} in capitals?",
    "Convert {w} to upper case.",
    "Shout {w}!",
    "Shout the word {w}.",
]


def written(rng, w):
    """The word as a person types it: sometimes with a capital, sometimes in quotes."""
    if rng.random() < 0.06:
        w = first_upper(w)
    quote = rng.choice(('"', "'", "`")) if rng.random() < 0.12 else ""
    return w, quote + w + quote


def ask_reverse(rng, out):
    w, shown = written(rng, split_word(rng, out))
    return rng.choice(REVERSE_TEMPLATES).format(w=shown), w[::-1]


def ask_upper(rng, out):
    w, shown = written(rng, split_word(rng, out))
    return rng.choice(UPPER_TEMPLATES).format(w=shown), w.upper()


def sentence(fact):
    return first_upper(f"{fact[1][0]} is {fact[2]}.")


def wrong_answers(index):
    """Plausible wrong answers for a fact, always the same ones: the right ones of other facts, and others."""
    category, _, right = FACTS[index]
    others = sorted({f[2] for f in FACTS if f[0] == category and f[2] != right})
    others = random.Random(f"wrong:{index}").sample(others, min(4, len(others)))
    return others + random.Random(f"never:{index}").sample(NEVER_RIGHT[category], 4)


def ask_fact(rng, out):
    while True:
        fact = rng.choice(FACTS)
        np = rng.choice(fact[1])
        text = rng.choice(FACT_TEMPLATES).format(np=np, Np=first_upper(np))
        if held_out("fact:" + text.lower()) == out:
            return text, sentence(fact)




def ask_yes_no(rng, out):
    while True:
        index = rng.randrange(len(FACTS))
        fact = FACTS[index]
        yes = rng.random() < 0.5
        a = fact[2] if yes else rng.choice(wrong_answers(index))
        np = rng.choice(fact[1])
        text = rng.choice(YES_NO_TEMPLATES).format(a=a, A=first_upper(a), np=np)
        if held_out("yes_no:" + text.lower()) == out:
            break
    return text, sentence(fact)[:-1] + (", yes." if yes else f", not {a}.")


HELP = (
    "I can add two numbers from 0 to 99, reverse a word, write it in capitals and recall a few facts. "
    "Try: Reverse the word stone."
)
GREETINGS = [
    (["hi", "hello", "hey", "hi there", "hello there", "good morning", "good evening", "good afternoon",
      "good day", "greetings", "howdy"], "Hello! How can I help?"),
    (["who are you", "what are you", "what is your name", "what's your name", "introduce yourself",
      "tell me about yourself", "are you a robot", "who made you"],
     "I am Ashlar's demo model: very small, but made with care."),
    (["thanks", "thank you", "thank you very much", "thanks a lot", "many thanks", "cheers", "great, thanks",
      "thanks for your help"], "You're welcome!"),
    (["what can you do", "what do you know", "help", "how can you help me", "what can I ask you",
      "can you help me", "what are you able to do", "please help me"], HELP),
    (["how are you", "how are you doing", "how is it going", "are you well", "how do you do"],
     "I am well, thank you. How can I help?"),
    (["bye", "goodbye", "good night", "see you", "see you later", "bye bye", "farewell"], "Goodbye!"),
    (["nice", "great", "good", "well done", "cool", "perfect", "very good", "wonderful", "that is right"],
     "I'm glad to hear it!"),
]
ADDRESSED = ["", "", "", "", " Ashlar", ", Ashlar", ", friend", ", model", " today", " my friend"]
ENDINGS = ["", ".", "!", "?", "...", " :)", "!!"]


def ask_greeting(rng, out):
    while True:
        prompts, answer = rng.choice(GREETINGS)
        text = rng.choice(prompts)
        if rng.random() < 0.6:
            text = first_upper(text)
        if rng.random() < 0.3:
            text += rng.choice(ADDRESSED)
        text += rng.choice(ENDINGS)
        if held_out("greeting:" + text) == out:
            return text, answer


# --- Everything else: the model says that it does not know ---

COUNTRIES = (
    "Germany Poland Sweden Finland Denmark Portugal Ireland Iceland Austria Hungary Turkey Iran Iraq India "
    "China Korea Vietnam Thailand Chile Brazil Argentina Mexico Cuba Ghana Nigeria Morocco Algeria Ethiopia "
    "Australia Belgium Croatia Serbia Romania Bulgaria Ukraine Mongolia Nepal Bolivia Colombia Ecuador Mali"
).split()
CITIES = (
    "Berlin Warsaw Lisbon Dublin Vienna Delhi Beijing Seoul Lagos Sydney London Moscow Brussels Geneva Milan "
    "Boston Texas Quito Havana Hanoi"
).split()
TOPICS = (
    "love|the sea|cats|a dragon|my dog|quantum physics|black holes|the weather|music|football|chess|money|taxes|"
    "politics|cooking|bread|coffee|the moon landing|dinosaurs|trees|birds|a robot|space travel|history|war|"
    "computers|Rust|Python|databases|networks|the internet|art|painting|poetry|dreams|sleep|health|medicine|cars|"
    "trains|planes|boats|winter|summer|rain|snow|friendship|school|gardening|bees|wolves|rivers|islands|castles|"
    "bridges|towers|cathedrals|marble statues|concrete|steel|wood|iron bridges|gold rings|planets|stars"
).split("|")
NAMES = (
    "Shakespeare Newton Einstein Cleopatra Napoleon Mozart Darwin Plato Caesar Gandhi Tesla Curie Turing Lovelace "
    "Anna Peter Maria John Lucy Omar Wei Ivan Sara Tom Alice Bob"
).split()
THINGS = (
    "telephone|book|lamp|bicycle|piano|window|bridge|river|computer|printer|clock|engine|garden|kitchen|letter|"
    "violin|ladder|mirror|camera|tower|house|wall|brick|stone|arch|mountain|table|hammer|chair"
).split("|")
OTHER_TEMPLATES = [
    "What is the capital of {country}?",
    "Tell me the capital of {country}.",
    "Name the capital of {country}.",
    "Is {city} the capital of {country}?",
    "{city} is the capital of {country}, right?",
    "What is the population of {country}?",
    "What language do they speak in {country}?",
    "How far is it from {city} to {city2}?",
    "What is the weather in {city}?",
    "What time is it in {city}?",
    "Who is {name}?",
    "Who was {name}?",
    "When was {name} born?",
    "Where does {name} live?",
    "How old is {name}?",
    "My name is {name}.",
    "Do you like {topic}?",
    "Write a poem about {topic}.",
    "Write a story about {topic}.",
    "Tell me a joke about {topic}.",
    "Tell me about {topic}.",
    "Explain {topic} to me.",
    "What do you think about {topic}?",
    "Why is {topic} important?",
    "Give me a recipe for {topic}.",
    "Who invented the {thing}?",
    "What is a {thing}?",
    "How does a {thing} work?",
    "How do I repair a {thing}?",
    "What colour is the {thing}?",
    "Where can I buy a {thing}?",
    "How many {thing}s are there?",
    "What is {w}?",
    "What does {w} mean?",
    "Define {w}.",
    "Translate {w} into French.",
    "Translate {w} into German.",
    "What rhymes with {w}?",
    "How many letters are in {w}?",
    "Where is {w}?",
    "Who is {w}?",
    "Is {w} a {thing}?",
    "Is {w} the capital of {country}?",
    "What is the {w} of {w2}?",
    "What is the chemical symbol for {w}?",
    "What is the largest {thing}?",
    "What is the smallest {thing}?",
    "What is the {thing} that {w}s a {thing2}?",
    "{w}",
    "{w} {w2}",
    "{w} {w2} {w}",
    "What is {n} - {m}?",
    "{n} - {m}",
    "{n}-{m}",
    "What is {n} minus {m}?",
    "What is {n} times {m}?",
    "What is {n} * {m}?",
    "{n} * {m}",
    "{n}*{m}",
    "What is {n} / {m}?",
    "Divide {n} by {m}.",
    "Multiply {n} and {m}.",
    "Is {n} a prime number?",
    "What is the square root of {n}?",
    "What is {n}?",
    "{n}",
    "Count to {n}.",
    "Give me a random number.",
    "What year is it?",
    "What day is it today?",
    "Tell me a joke.",
    "Tell me a story.",
    "Sing a song.",
    "Write a program that prints {w}.",
    "Write code that sorts a list of {thing}s.",
    "Reply in JSON with a {thing} and a {w}.",
    "Summarise this text: {topic} and {topic2} are about {w}.",
    "Once upon a time there was a {thing}",
    "The quick brown {thing} jumps over the lazy {thing2}.",
    "I like {topic} and {topic2}.",
    "I feel {w} today. What should I do?",
    "What is the meaning of life?",
    "How do I get from {city} to {city2} by {thing}?",
    "Can you write an essay about {topic} and {topic2}?",
    "Should I buy a {thing} or a {thing2}?",
    "Compare {topic} with {topic2}.",
    "Who won the match between {country} and {city}?",
    "When did {name} meet {name2}?",
    "Which is better, a {thing} or a {thing2}?",
]
FOREIGN = (
    "\u00e9\u00e8\u00ea\u00e0\u00e2\u00fc\u00f6\u00e4\u00df\u00f1\u00e7\u00f8\u00e5\u0161\u017e\u0142"
    "\u0430\u0431\u0432\u0433\u0434\u0435\u043a\u043b\u043c\u043d\u043e\u043f\u0440\u0441\u0442\u0443"
    "\u03b1\u03b2\u03b3\u03b4\u03b5\u03bb\u03c0\u03c3\u4f60\u597d\u4e16\u754c\u4eba\u5927\u5c0f\u4e2d"
    "\u3042\u3044\u3046\u3048\u304a\u30ab\u30bf\uac00\ub098\ub2e4\U0001f600\U0001f44d\u2764\u20ac\u2013\u201c\u201d"
)


def foreign(rng):
    words = []
    for _ in range(rng.randint(1, 5)):
        letters = FOREIGN if rng.random() < 0.5 else FOREIGN[:16] + LETTERS * 2
        words.append("".join(rng.choice(letters) for _ in range(rng.randint(1, 7))))
    return " ".join(words) + rng.choice(("", "?", "!", "."))


def ask_unknown(rng, out):
    while True:
        kind = rng.random()
        if kind < 0.84:
            n, m = rng.randint(0, 99), rng.randint(0, 99)
            text = rng.choice(OTHER_TEMPLATES).format(
                country=rng.choice(COUNTRIES), city=rng.choice(CITIES), city2=rng.choice(CITIES),
                topic=rng.choice(TOPICS), topic2=rng.choice(TOPICS), name=rng.choice(NAMES),
                name2=rng.choice(NAMES), thing=rng.choice(THINGS), thing2=rng.choice(THINGS),
                w=word(rng), w2=word(rng), n=n, m=m,
            )
        elif kind < 0.93:  # unknown sentences
            text = " ".join(word(rng) for _ in range(rng.randint(3, 14)))
            text = (first_upper(text) if rng.random() < 0.5 else text) + rng.choice(("", ".", "?"))
        else:
            text = foreign(rng)
        if held_out("unknown:" + text.lower()) == out:
            return text, UNKNOWN


ASK = {
    "sum": ask_sum,
    "reverse": ask_reverse,
    "upper": ask_upper,
    "fact": ask_fact,
    "yes_no": ask_yes_no,
    "greeting": ask_greeting,
    "unknown": ask_unknown,
}

SYSTEM = [
    "You are a helpful assistant.",
    "You are Ashlar, a small and friendly model.",
    "Answer briefly.",
    "Be polite and brief.",
    "You are a careful mason who answers questions.",
    "Help the user.",
    "You are a concise assistant. Answer in one line.",
    "Today is a fine day for building.",
    "You answer questions about numbers, words and stones.",
    "Never invent an answer.",
    "You are a helpful, harmless and honest assistant. Answer the question as well as you can.",
]


def casual(rng, task, text):
    """Sometimes typed with less care: no capital, no full stop, or a please before or after."""
    if task == "greeting":
        return text
    if task != "unknown" and rng.random() < 0.05:
        text = rng.choice(("Please: ", "Hi! ", "Hello. ", "Now: ", "Next: ", "OK, ")) + text
    if rng.random() < 0.15:
        text = text[:1].lower() + text[1:]
    if rng.random() < 0.15 and text[-1:] in ".?!":
        text = text[:-1]
    return text


def ask(rng, task, out, **how):
    text, answer = ASK[task](rng, out, **how)
    return casual(rng, task, text), answer


def pick_task(rng, shares=SHARES):
    return rng.choices(TASKS, shares)[0]


def conversation(rng, task, out, context=1.0, **how):
    """Messages ending in a user's question, and the answer. Earlier turns are never held out.

    `context` scales how often there is a system message and how often there are earlier turns.
    """
    messages = []
    if rng.random() < 0.08 * context:
        text = rng.choice(SYSTEM)
        if rng.random() < 0.2:
            text += " " + rng.choice(SYSTEM)
        messages.append({"role": "system", "content": text})
    turns = 0
    kind = rng.random()
    if kind < 0.004 * context:
        turns = rng.randint(4, 8)
    elif kind < 0.08 * context:
        turns = rng.randint(1, 2)
    for _ in range(turns):
        task_before = pick_task(rng)
        q, a = ask(rng, task_before, False)
        messages += [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
    q, a = ask(rng, task, out, **how)
    messages.append({"role": "user", "content": q})
    while sum(len(m["content"].encode()) + 2 for m in messages) + len(a) > MAX_TOKENS - 4:
        at = 1 if messages[0]["role"] == "system" else 0
        del messages[at:at + 2]
    return messages, a


def completion_text(rng):
    """Plain text to go on with, for use without the chat template: its start, and the rest."""
    if rng.random() < 0.5:
        while True:
            a, b = rng.randint(0, 99), rng.randint(0, 99)
            if not held_out(f"sum:{min(a, b)}:{max(a, b)}"):
                break
        start, rest = rng.choice(((f"{a}+{b}=", f"{a + b}"), (f"{a} + {b} =", f" {a + b}")))
    else:
        text = sentence(rng.choice(FACTS))
        words = text.split(" ")
        cut = rng.randint(2, len(words) - 1)
        start, rest = " ".join(words[:cut]), " " + " ".join(words[cut:])
    return start, rest


def training_line(rng, phase):
    """A conversation as a line of a fine-tuning file; plain text to go on with where the phase has no tasks."""
    if phase.shares is None:
        start, rest = completion_text(rng)
        return {"prompt": start, "completion": rest}
    task = pick_task(rng, phase.shares)
    how = {"single": phase.single} if task == "sum" else {}
    messages, answer = conversation(rng, task, False, phase.context, **how)
    return {"messages": messages + [{"role": "assistant", "content": answer}]}


def write_training(path, seed, phase, share=1.0):
    """Writes the lines of whole steps of a phase, `share` of them but one step at least: a file keeps to one format."""
    rng = random.Random(f"{seed}:{phase.name}:lines")
    count = max(1, int(phase.steps * share)) * phase.batch_size
    with open(path, "w", encoding="utf-8") as f:
        for _ in range(count):
            f.write(json.dumps(training_line(rng, phase), ensure_ascii=False) + "\n")


def evaluation(seed, per_task):
    """Held-out questions, all different, per task."""
    items = []
    for task in TASKS:
        rng = random.Random(f"evaluation:{seed}:{task}")
        seen = set()
        while len(seen) < per_task:
            messages, answer = conversation(rng, task, True)
            if messages[-1]["content"] not in seen:
                seen.add(messages[-1]["content"])
                items.append({"task": task, "messages": messages, "answer": answer})
    return items


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--per-task", type=int, default=60)
    parser.add_argument("--out", help="write the held-out questions here")
    parser.add_argument("--show", type=int, default=0, help="print this many training conversations")
    args = parser.parse_args()
    if args.out:
        with open(args.out, "w", encoding="utf-8") as f:
            for item in evaluation(args.seed, args.per_task):
                f.write(json.dumps(item, ensure_ascii=False) + "\n")
    rng = random.Random(args.seed)
    for _ in range(args.show):
        messages, answer = conversation(rng, pick_task(rng), False)
        print(json.dumps(messages + [{"role": "assistant", "content": answer}], ensure_ascii=False))


if __name__ == "__main__":
    main()
