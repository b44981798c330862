"""The forty facts the demo model knows.

Each fact is (category, ways of naming the thing asked for, answer). The sentence the model
answers with is "<first way> is <answer>.", so the first way has to read well in it.
"""

FACTS = [
    # Masonry
    ("mason", ["the stone that locks an arch", "the top stone of an arch"], "the keystone"),
    ("mason", ["the name for finely cut square stone", "the word for stone cut into neat blocks"], "ashlar"),
    ("mason", ["the name for rough uncut stone", "the word for rough broken stone"], "rubble"),
    ("mason", ["the paste that binds bricks", "the mix that holds bricks together"], "mortar"),
    ("mason", ["the tool that spreads mortar", "the tool a mason spreads mortar with"], "the trowel"),
    ("mason", ["the tool that shows a true vertical", "the weighted string that hangs straight down"], "the plumb line"),
    ("mason", ["the tool that carves stone", "the sharp tool struck with a mallet"], "the chisel"),
    ("mason", ["the brick laid with its long side showing", "the brick that shows its long side"], "the stretcher"),
    ("mason", ["the brick laid with its end showing", "the brick that shows its short end"], "the header"),
    ("mason", ["the row of stones on top of a wall", "the top layer that keeps rain off a wall"], "the coping"),
    ("mason", ["the beam above a doorway", "the beam that spans a door or window"], "the lintel"),
    ("mason", ["the stone at the corner of a wall", "the dressed corner stone of a building"], "the quoin"),
    # Rocks
    ("rock", ["the rock that turns into marble", "the rock that marble forms from"], "limestone"),
    ("rock", ["the rock that turns into slate", "the rock that slate forms from"], "shale"),
    ("rock", ["the rock made of grains of sand", "the rock that forms from sand"], "sandstone"),
    ("rock", ["the volcanic rock that can float", "the rock so light that it floats on water"], "pumice"),
    ("rock", ["the name for volcanic glass", "the glassy rock from volcanoes"], "obsidian"),
    # Capitals
    ("capital", ["the capital of France", "the French capital"], "Paris"),
    ("capital", ["the capital of Italy", "the Italian capital"], "Rome"),
    ("capital", ["the capital of Spain", "the Spanish capital"], "Madrid"),
    ("capital", ["the capital of Japan", "the Japanese capital"], "Tokyo"),
    ("capital", ["the capital of Egypt", "the Egyptian capital"], "Cairo"),
    ("capital", ["the capital of Greece", "the Greek capital"], "Athens"),
    ("capital", ["the capital of Canada", "the Canadian capital"], "Ottawa"),
    ("capital", ["the capital of Peru", "the Peruvian capital"], "Lima"),
    ("capital", ["the capital of Norway", "the Norwegian capital"], "Oslo"),
    ("capital", ["the capital of Kenya", "the Kenyan capital"], "Nairobi"),
    # The Earth
    ("earth", ["the largest ocean", "the biggest ocean on Earth"], "the Pacific"),
    ("earth", ["the highest mountain on Earth", "the tallest mountain above the sea"], "Mount Everest"),
    ("earth", ["the largest hot desert", "the biggest hot desert on Earth"], "the Sahara"),
    # The sky
    ("sky", ["the largest planet", "the biggest planet of the Sun"], "Jupiter"),
    ("sky", ["the planet closest to the Sun", "the innermost planet"], "Mercury"),
    ("sky", ["the planet called the red planet", "the red planet"], "Mars"),
    ("sky", ["the planet known for its bright rings", "the planet with the great rings"], "Saturn"),
    ("sky", ["the star closest to the Earth", "the star that lights our days"], "the Sun"),
    # Matter
    ("symbol", ["the chemical symbol for gold", "the symbol of gold"], "Au"),
    ("symbol", ["the chemical symbol for iron", "the symbol of iron"], "Fe"),
    ("symbol", ["the chemical symbol for silver", "the symbol of silver"], "Ag"),
    ("matter", ["the hardest natural mineral", "the hardest mineral found in nature"], "diamond"),
    ("matter", ["the lightest element", "the lightest chemical element"], "hydrogen"),
]

# Wrong answers that are right for no fact.
NEVER_RIGHT = {
    "mason": ["the gable", "plaster", "the spade", "the rafter", "the gutter", "the hinge", "the carpet", "varnish"],
    "rock": ["granite", "basalt", "chalk", "coal", "flint"],
    "capital": ["Lyon", "Milan", "Venice", "Seville", "Osaka", "Kyoto", "Toronto", "Bergen", "Mombasa", "Cusco"],
    "earth": ["the Atlantic", "Mont Blanc", "the Gobi", "the Thames"],
    "sky": ["Venus", "Neptune", "Uranus", "the Moon"],
    "symbol": ["Cu", "Pb", "Zn", "Sn"],
    "matter": ["quartz", "helium", "talc", "oxygen"],
}

FACT_TEMPLATES = [
    "What is {np}?",
    "What's {np}?",
    "Tell me {np}.",
    "Can you tell me {np}?",
    "Do you know {np}?",
    "Name {np}.",
    "Please name {np}.",
    "I would like to know {np}.",
    "{Np}?",
    "{Np} is?",
    "{Np}, please.",
    "Could you name {np}?",
    "Quick question: what is {np}?",
    "Hello, what is {np}?",
    "Give me {np}.",
    "What would you call {np}?",
]

YES_NO_TEMPLATES = [
    "Is {a} {np}?",
    "Is it true that {a} is {np}?",
    "{A} is {np}, right?",
    "Am I right that {a} is {np}?",
    "I think {a} is {np}. Is that so?",
    "Can you confirm that {a} is {np}?",
    "Would you say {a} is {np}?",
    "So {a} is {np}?",
]
