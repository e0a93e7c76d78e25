"""Words and phrases of the demo's documents; several are shared between domains."""


def _list(words: str) -> tuple[str, ...]:
    return tuple(words.split(", "))


NAMES = _list(
    "Nora, Omar, Lena, Tom, Priya, Hugo, Mei, Sam, Ada, Ravi, Clara, Ben, Ines, Karl, Zoe, Luis, Maya, "
    "Finn, Ruth, Ivan, Elsa, Noah, Dina, Paul, Sara, Jonas, Tara, Viktor, Amy, Leo"
)
FRIENDS = _list("my sister, my brother, my neighbour, a friend, my mother, my teacher, our team, my son")
THINGS = _list(
    "apples, pears, lemons, eggs, cups, plates, books, pens, boxes, bags, tickets, candles, stamps, "
    "cards, shells, stones, onions, carrots, coins, buttons"
)
CONTAINERS = _list("bags, boxes, baskets, packs, trays")
CITIES = _list(
    "Lisbon, Oslo, Turin, Bergen, Ghent, Porto, Riga, Split, Cork, Nantes, Graz, Malmo, Seville, Bruges, "
    "Tallinn, Zadar, Leeds, Basel, Trieste, Galway"
)
DAYS = _list("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
VEGETABLES = _list(
    "onion, carrot, leek, potato, tomato, courgette, pepper, fennel, pumpkin, cauliflower, mushroom, "
    "spinach, cabbage, aubergine, celery"
)
STAPLES = (
    ("lentil", "g of red lentils"),
    ("rice", "g of rice"),
    ("chickpea", "g of chickpeas"),
    ("barley", "g of barley"),
    ("bean", "g of white beans"),
    ("noodle", "g of noodles"),
    ("chicken", "g of chicken"),
    ("salmon", "g of salmon"),
    ("tofu", "g of tofu"),
)
SPICES = _list("cumin, thyme, paprika, ginger, basil, mint, turmeric, rosemary, chilli, coriander")
DISHES = _list("soup, stew, salad, curry, pie, bake, risotto, casserole")
RECIPE_TIPS = (
    "serve it warm with {bread} and a little {spice}",
    "it tastes even better on the second day with {spice}",
    "freeze what is left in small boxes for {day}",
    "a squeeze of lemon and some {spice} make it lighter",
    "use {bread} to clean the bowl",
    "swap the {spice} for {spice2} if the children eat too",
    "keep some {spice} aside for the table",
    "a bowl of {bread} goes well with it",
)
BREADS = _list("dark bread, flat bread, fresh rolls, toast, corn bread")
TOPICS = (
    ("a birthday party", "a short list of guests, a cake and some music"),
    ("a letter of thanks", "one kind sentence, a memory and a warm closing"),
    ("a small garden", "good soil, water in the morning and herbs that like the sun"),
    ("a reading plan", "two books a month, a quiet chair and a notebook"),
    ("a job interview", "clear answers, two questions and a calm voice"),
    ("a weekend at home", "a long walk, a board game and an early night"),
    ("a speech at a wedding", "a story about the couple, a joke and a toast"),
    ("a morning routine", "a glass of water, ten minutes of stretching and a simple breakfast"),
    ("a study group", "a fixed hour, a shared page of notes and one person who leads"),
    ("a new hobby", "cheap tools, a patient teacher and a little time every day"),
    ("a budget", "a list of what comes in, a list of what goes out and a small reserve"),
    ("a quiet evening", "soft light, some tea and no phone"),
)
ASKS = (
    "Could you help me plan {topic} for {friend}?",
    "I want to surprise {friend} with {topic}. What do I need?",
    "What makes {topic} good? I need ideas for {friend}.",
    "Please give me some advice about {topic}.",
    "{name} asked me about {topic}. What should I say?",
    "How do I start with {topic} when I have only {n} days?",
)
OPENERS = (
    "Of course.",
    "Gladly.",
    "Good question.",
    "Sure, {name}.",
    "Happy to help.",
    "That is a nice idea.",
)
ADVICE = (
    "Take your time and write down what matters most to {friend}.",
    "Ask {name} for help, because two people see more than one.",
    "Try it once on {day} before the real day comes.",
    "Do not spend more than {n} hours on it.",
    "If something goes wrong, smile and go on with the next step.",
    "Small things count more than big plans.",
    "Keep a few {thing} and some paper at hand.",
    "Start on {day} and leave the rest for {day2}.",
)
CLOSINGS = (
    "I hope this helps.",
    "Let me know how it goes.",
    "Tip: keep it simple.",
    "Would you like an example?",
    "Enjoy it, and say hello to {name}.",
    "You can do it.",
)
SKIES = _list("cloudy, bright and clear, grey with light rain, windy, foggy, cold but sunny, warm and humid")
SIGHTS = _list(
    "the old harbour, the castle on the hill, the botanical garden, the covered market, the lighthouse, "
    "the cathedral, the river walk, the small museum, the north beach, the tower, the railway bridge"
)
TRANSPORT = _list("train, tram, ferry, bus, night train, bicycle")
NOTES = (
    "{name} bought {n} postcards near {sight}.",
    "The {transport} to {sight} was {n} minutes late, but nobody minded.",
    "We had lunch by {sight} and watched the boats for an hour.",
    "A guide told us that {sight} is more than {n}00 years old.",
    "In the afternoon the wind turned and we walked back from {sight}.",
    "{name} lost a glove on the {transport} and found it again.",
)
TRAVEL_TIPS = (
    "take a coat, the evenings are cool",
    "buy the {transport} ticket the day before",
    "go to {sight} before nine",
    "carry some coins for the {transport}",
    "ask for a room on the quiet side",
)
