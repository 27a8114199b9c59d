"""The prompts of the cultural set (paper, Appendix B), and the subjects and task types that they offer.

`SCORING` and the variants of `RECAPTION` are the paper's. `INSTRUCTIONS` is ours: the paper prints only its task
types and rules.
"""

PROMPTS = "pangea-appendix-b/1"
"""Version of the prompts, part of every record's provenance."""

SUBJECTS = (
    "Vehicles and Transportation",
    "Cooking and Food",
    "People and Everyday Life",
    "Sports and Recreation",
    "Plants and Animals",
    "Objects, Materials, and Clothing",
    "Brands and Products",
    "Geography, Buildings, and Landmarks",
    "Tradition, Art, and History",
    "Public Figure and Pop-Culture",
    "Others",
)
TASK_TYPES = (
    "Coding & Debugging",
    "Information Seeking",
    "Creative Writing",
    "Critical Reasoning",
    "Planning & Strategy",
    "Mathematical Thinking",
    "Text Revision & Editing",
    "Data Analysis",
    "Role Playing & Scenarios",
    "Brainstorming & Ideation",
    "Advice Seeking & Problem-Solving",
    "Learning & Understanding",
    "Cultural Interpretation",
)
SCORING = """You are given an [Alt Text] associated with an image from the web. [Alt Text]: {text} Your goal is to:
1. Evaluate Text Quality: Rate the following alt text on a scale from 1 to 5 based on its quality in describing \
the image, assuming the model does not have access to the image: 1 (Very Low Quality): Alt text is vague, \
irrelevant, misleading, or uses placeholders (e.g., file names). 2 (Low Quality): Alt text is overly simplistic, \
generic, or provides minimal useful information. 3 (Moderate Quality): Alt text is somewhat descriptive but lacks \
detail or relevance, with possible redundancy or ambiguity. 4 (High Quality): Alt text is descriptive, clear, \
concise, and provides sufficient information to understand the image's content. 5 (Very High Quality): Alt text \
is highly specific, detailed, and relevant, with a clear description that conveys all key aspects of the image.
2. Subject Classification: Assign a subject/category to the alt text based on its content. Choose from the \
following categories: {subjects}
3. Country/Region Classification: Decide if the alt text is closely related to a specific country's culture. For \
example, if the alt text says, "Tokyo Skytree Photo in March with beautiful cherry blossoms", it's strongly \
related to Japan. If the alt text is not specifically about a certain culture or country, you can say "No \
specific country". Even if the alt text is written in their official language, it doesn't mean the caption is \
specifically about the country (e.g., a product page caption is often unlikely to be country-specific).
Output: Provide the final result in the following structured format: 1. Text Quality Score (1-5): 2. Subject \
Category: 3. Country/Region: Only generate the final result without any additional descriptions or explanations."""
RECAPTION = (
    "Please describe the image in detail in {language}. The image might be related to the country: "
    '"{country}". The topic might be related to: "{subject}". The previous short caption of the image is '
    "{text}.",
    'Analyze this image and provide a comprehensive description in "{language}". Consider that it may be '
    'associated with "{country}" and the theme could be related to "{subject}". If there is cultural '
    "significance, please include it. A brief previous description was: {text}.",
    'In "{language}", give a detailed description of what you see in this image. Keep in mind it might be '
    'connected to "{country}" and the subject could be about "{subject}". If there are culturally relevant '
    "details, please include them. An earlier short description stated: {text}.",
    'Examine this image closely and describe its contents in "{language}" in a more structured way. The image '
    'might have a connection to "{country}" and could be about "{subject}". A previous concise caption '
    "mentioned: {text}.",
    'Using "{language}", provide an in-depth and structured description of this image. It may be related to '
    '"{country}" and the topic could be associated with "{subject}". A prior brief description was given as: '
    "{text}.",
)
INSTRUCTIONS = """Task: Generate two instruction-response pairs based on the visual content of an image. Choose two \
task types from the list below: {task_types}.
Guidelines:
1. The two pairs are of two different task types.
2. An instruction needs details of the image and cannot be answered without seeing it.
3. A response is detailed and well structured, takes several perspectives or goes step by step where that helps.
4. The instructions are varied and challenging.
5. Write as if looking at the image: never mention a caption or a description.
6. Write instruction and response in {language}, and the task type in English.
Output: a JSON list of two objects with the keys "task type", "instruction" and "response", and nothing else.
Caption: {caption}"""
