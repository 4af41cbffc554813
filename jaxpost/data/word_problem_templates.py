"""The texts of the word problems: `WORDS` fills the gaps in `TEMPLATES`; `word_problems.py` reads both.

A template is a paragraph. Its first line is `name: quantity, quantity, ...`, each quantity being a drawn one,
`count 3..12` or `percent 10 20 25`, or a computed one, `cost = count * price`. Then come the stories, the questions
(`? `) and the steps of the solution (`= `). Any story goes with any question; a step `[cost = count * price]` is
rendered as `4 * 6 = 24`, and the last one is the answer. No quantity that counts things is ever 1, so plurals hold.
"""

# Forms of the key / forms of each entry. Every form can also be written capitalised: {He}, {Goods}.
WORDS = {
    "name/he/his": "Anna/she/her, Ben/he/his, Carla/she/her, David/he/his, Elena/she/her, Felix/he/his, Grace/she/her, "
    "Hugo/he/his, Ines/she/her, Jamal/he/his, Keiko/she/her, Liam/he/his, Maria/she/her, Noah/he/his, Olga/she/her, "
    "Pedro/he/his, Ruth/she/her, Samir/he/his, Tara/she/her, Victor/he/his, Wendy/she/her, Yusuf/he/his",
    "friend": "Alice, Bruno, Chloe, Diego, Emma, Farid, Hana, Ivan, Julia, Karl, Leila, Marco, Nina, Oscar, Priya, "
    "Rosa, Simon, Teo, Vera, Walter, Zoe",
    "child/children": "child/children, student/students, camper/campers, scout/scouts, player/players",
    "good/goods": "candle/candles, mug/mugs, poster/posters, puzzle/puzzles, scarf/scarves, cap/caps, book/books, "
    "notebook/notebooks, T-shirt/T-shirts, toy car/toy cars, key ring/key rings, picture frame/picture frames",
    "market": "the market, the school fair, the craft fair, the corner store, the gift shop, the flea market",
    "stamp/stamps": "stamp/stamps, marble/marbles, sticker/stickers, seashell/seashells, bead/beads, "
    "postcard/postcards, baseball card/baseball cards, button/buttons, foreign coin/foreign coins, badge/badges",
    "treat/treats": "cookie/cookies, strawberry/strawberries, grape/grapes, cherry/cherries, walnut/walnuts, "
    "cracker/crackers, almond/almonds, plum/plums, pretzel/pretzels, marshmallow/marshmallows",
    "fruit/fruits": "apple/apples, pear/pears, orange/oranges, lemon/lemons, peach/peaches, tomato/tomatoes, "
    "onion/onions, mango/mangoes, potato/potatoes, lime/limes",
    "box/boxes": "box/boxes, bag/bags, basket/baskets, crate/crates, tray/trays, carton/cartons",
    "desk/desks": "desk/desks, bookcase/bookcases, tent/tents, bicycle/bicycles, keyboard/keyboards, guitar/guitars, "
    "telescope/telescopes, camera/cameras, printer/printers, sewing machine/sewing machines",
    "job": "at a bakery, in a bookstore, at a car wash, in a flower shop, at a pool, on a farm, in a library, "
    "at an animal shelter, in a toy store, at an ice cream stand",
    "truck": "truck, bus, train, van, car, delivery van",
    "bus": "bus, tram, train, shuttle bus, streetcar, subway train",
    "van/vans": "van/vans, minibus/minibuses, jeep/jeeps, boat/boats, motorboat/motorboats",
    "garden": "garden, playground, meadow, chicken yard, vegetable patch, lawn",
    "pool": "pool, pond, patio, flower bed, shed, greenhouse",
    "product/products": "can/cans, bottle/bottles, jar/jars, pencil/pencils, bolt/bolts, light bulb/light bulbs, "
    "battery/batteries, spoon/spoons",
    "cake/cakes": "cake/cakes, pie/pies, pizza/pizzas, loaf/loaves",
    "theater": "theater, concert hall, cinema, lecture hall, circus tent",
    "sunflower": "sunflower, bean plant, tomato plant, rose bush, young bamboo plant, vine",
    "museum": "the museum, the zoo, the aquarium, the water park, the circus, the castle, the science center",
    "tree/trees": "tree/trees, lamp/lamps, flagpole/flagpoles, pine/pines, maple/maples, bench/benches",
}

TEMPLATES = """
change: count 3..12, price 3..15, left 2..20, budget = count * price + left
{name} has ${budget} and buys {count} {goods} at ${price} each.
{name} takes ${budget} to {market} and buys {count} {goods}, which cost ${price} each.
{Goods} cost ${price} each at {market}. {name} arrives there with ${budget} and buys {count} of them.
? How much money does {name} have left?
? How many dollars does {he} have left?
= The {goods} cost [cost = count * price] dollars.
= {name} has [left = budget - cost] dollars left.

discount: percent 10 20 25 30 40 50 60, unit 2..15, count 2..6, price = 20 * unit
A {desk} normally costs ${price}. A school buys {count} of them in a sale with {percent}% off.
A store takes {percent}% off its {desks}, which normally cost ${price} each. A club orders {count} of them.
A summer camp needs {count} {desks}. They usually cost ${price} each, but today they are {percent}% off.
? How much do the {desks} cost in total?
? What is the total price after the discount?
= The discount on one {desk} is [off = price * percent / 100] dollars.
= One {desk} now costs [sale = price - off] dollars.
= Together the {desks} cost [total = count * sale] dollars.

commute: percent 10 15 20 25 30 35 40 45 50 55 60, unit 5..25, riders 5..30, total = 20 * unit
A school has {total} students. Of these, {percent}% walk to school, {riders} take the bus, and the others cycle.
Of the {total} students at a school, {percent}% walk there, {riders} come by bus, and the rest ride bicycles.
? How many students come by bicycle?
? How many of the students cycle to school?
= The number of students who walk is [walk = total * percent / 100].
= That leaves [others = total - walk] students.
= Of these, [cycle = others - riders] come by bicycle.

wages: hours 3..8, days 3..12, wage 9..24
{name} works {job} for ${wage} an hour. {He} works {hours} hours a day for {days} days.
{name} has a summer job {job} and earns ${wage} an hour. {He} works {days} days, {hours} hours each day.
A job {job} pays ${wage} an hour. {name} takes it for {days} days and works {hours} hours a day.
? How much money does {he} earn in total?
? How many dollars does {name} earn altogether?
= {name} works [time = days * hours] hours in total.
= {name} earns [pay = time * wage] dollars.

overtime: base 20..40, wage 10..20, bump 2..6, extra 2..10, higher = wage + bump, worked = base + extra
{name} earns ${wage} an hour for the first {base} hours of a week and ${higher} an hour after that.
{name} works {job}. The first {base} hours of a week pay ${wage} each, and every further hour pays ${higher}.
? One week {he} works {worked} hours. How much does {he} earn that week?
? How many dollars does {name} earn in a week of {worked} hours?
= {name} works [extra = worked - base] extra hours.
= The first {base} hours pay [usual = base * wage] dollars.
= The extra hours pay [bonus = extra * higher] dollars.
= {name} earns [pay = usual + bonus] dollars.

legs: slow 30 35 40 45 50 55 60 65, first 2..5, faster 5 10 15 20, second 2..5, fast = slow + faster
A {truck} travels at {slow} miles per hour for {first} hours and then at {fast} miles per hour for {second} hours.
A {truck} makes a trip in two parts: {first} hours at {slow} miles per hour, then {second} hours at {fast}.
? How many miles does it travel in total?
? How long is the whole trip in miles?
= The first part of the trip is [near = slow * first] miles long.
= The second part is [far = fast * second] miles long.
= The whole trip is [trip = near + far] miles long.

sharing: own 6..20, heads 4..9, share 6..15, other = heads * share - own
{name} brings {own} {treats}, and {friend} brings {other}. They share all of them equally among {heads} {children}.
{name} has {own} {treats} and {friend} has {other}. They put them together for {heads} {children} to share equally.
At a party, {name} serves {own} {treats} and {friend} serves {other}. The {heads} {children} there share them equally.
? How many {treats} does each {child} get?
? How many {treats} are there for each {child}?
= Together there are [total = own + other] {treats}.
= Each {child} gets [share = total / heads] {treats}.

packing: left 2..5, gap 1..8, full 5..30, size = left + gap, total = full * size + left
{name} picks {total} {fruits} and packs them into {boxes} of {size}.
A farm sells {fruits} in {boxes} that hold {size} each. Today it has {total} {fruits} to pack.
{name} has {total} {fruits} and puts them into {boxes}, {size} {fruits} in each {box}.
? After as many {boxes} as possible are filled, how many {fruits} are left over?
? How many {fruits} remain when no further {box} can be filled?
= There are enough {fruits} for {full} full {boxes}, which hold [used = full * size] {fruits}.
= That leaves [left = total - used] {fruits}.

outing: left 2..4, gap 2..8, full 3..15, size = left + gap, total = full * size + left
A group of {total} {children} goes on a trip in {vans} that carry {size} {children} each.
There are {total} {children} at a summer camp. They travel to an island in {vans} with {size} seats each.
? What is the smallest number of {vans} they need?
? How many {vans} are needed to carry all the {children}?
= The first {full} {vans} carry [seated = full * size] {children}.
= That leaves [left = total - seated] {children}, who need one more {van}.
= So they need [needed = full + 1] {vans}.

ages: age 3..11, times 3..6, years 2..20
{friend} is {age} years old, and {name} is {times} times as old.
{name} is {times} times as old as {friend}, who is {age}.
? How old will {name} be in {years} years?
? What will {name}'s age be {years} years from now?
= {name} is now [now = times * age] years old.
= In {years} years {name} will be [later = now + years] years old.

age_gap: young 5..40, gap 2..25, old = young + gap, sum = young + old
{name} is {gap} years older than {friend}. Together they are {sum} years old.
The ages of {name} and {friend} add up to {sum} years. {name} is {gap} years older than {friend}.
? How old is {name}?
? What is {name}'s age?
= Without the extra {gap} years, the two ages would add up to [even = sum - gap].
= So {friend} is [young = even / 2] years old.
= {name} is [old = young + gap] years old.

fence: wide 6..22, stretch 2..10, price 3..15, long = wide + stretch
A rectangular {garden} is {long} meters long and {wide} meters wide. A fence costs ${price} per meter.
{name} needs a fence around a rectangular {garden} of {long} by {wide} meters. Each meter of fence costs ${price}.
? How much does a fence around the whole {garden} cost?
? How many dollars does it cost to fence the whole {garden}?
= One long side and one short side are [half = long + wide] meters together.
= The fence is [around = 2 * half] meters long.
= It costs [cost = around * price] dollars.

yard: narrow 3..8, a 1..4, b 3..10, c 3..8, length = narrow + a, wide = narrow + b, long = wide + c
A rectangular yard is {long} meters long and {wide} meters wide. It has a {pool} of {length} by {narrow} meters.
In a yard that measures {long} by {wide} meters, there is a rectangular {pool} of {length} by {narrow} meters.
? How many square meters of the yard are not covered by the {pool}?
? The rest of the yard is grass. How many square meters of grass are there?
= The yard covers [whole = long * wide] square meters.
= The {pool} covers [part = length * narrow] square meters.
= That leaves [grass = whole - part] square meters.

factory: hours 2..5, rate 3..15, pause 5 10 15 20 25 30 35 40 45
A machine makes {rate} {products} a minute. It runs for {hours} hours, except for a break of {pause} minutes.
A machine is on for {hours} hours but stands still for {pause} minutes. Otherwise it makes {rate} {products} a minute.
? How many {products} does it make?
? How many {products} does the machine make in that time?
= The machine is on for [whole = hours * 60] minutes.
= It works for [busy = whole - pause] minutes.
= It makes [made = busy * rate] {products}.

coins: quarters 2..9, dimes 2..9, nickels 2..9
{name} opens {his} piggy bank and finds {quarters} quarters, {dimes} dimes and {nickels} nickels.
{name} has {quarters} quarters, {dimes} dimes and {nickels} nickels in {his} pocket.
? How many cents is that in total?
? How much money is that in cents?
= The quarters are worth [high = quarters * 25] cents.
= The dimes are worth [middle = dimes * 10] cents.
= The nickels are worth [low = nickels * 5] cents.
= In total that is [total = high + middle + low] cents.

baking: kilos 3..7, grams 120 150 180 200 220 240 250 280 300 320, baked 3..9
A baker has {kilos} kilograms of flour and bakes {baked} {cakes} with {grams} grams of flour in each.
{name} buys {kilos} kilograms of flour and bakes {baked} {cakes}. Each {cake} takes {grams} grams of flour.
? How many grams of flour are left?
? How much flour is left, in grams?
= At first there are [flour = kilos * 1000] grams of flour.
= The {cakes} take [used = baked * grams] grams.
= That leaves [left = flour - used] grams of flour.

reading: days 3..7, pages 8..30, more 2..6, daily 10..40, book = days * pages + more * daily
{name} is reading a book of {book} pages. For {days} days {he} reads {pages} pages a day.
A book has {book} pages, and {name} reads {pages} of them a day for {days} days.
? How many pages a day must {he} read to finish the book in {more} more days?
? {He} wants to finish in {more} more days. How many pages must {he} read each day?
= {name} has read [done = days * pages] pages.
= There are [rest = book - done] pages left.
= {name} must read [daily = rest / more] pages a day.

gift: parts 3..6, unit 4..20, sold 2..6, total = parts * unit
{name} has {total} {stamps}. {He} gives 1/{parts} of them to {friend} and then sells {sold}.
{name} collects {stamps} and has {total} of them. After giving 1/{parts} of them to {friend}, {he} sells {sold}.
? How many {stamps} does {name} have left?
? How many {stamps} does {name} keep?
= {friend} gets [gift = total / parts] {stamps}.
= {name} then has [rest = total - gift] {stamps}.
= After the sale {name} has [left = rest - sold] {stamps}.

seats: bottom 5 7, top 2 3 4, unit 12..40, come 3..10, total = bottom * unit
A {theater} has {total} seats, and {top}/{bottom} of them are taken. Then {come} more people sit down.
In a {theater} with {total} seats, {top}/{bottom} of the seats are taken. Then {come} more people come in and sit down.
? How many seats are still empty?
? How many seats are free now?
= Since 1/{bottom} of the seats is [part = total / bottom], there are [taken = top * part] seats taken at first.
= With the new people, [now = taken + come] seats are taken.
= So [empty = total - now] seats are empty.

compare: few 5..25, times 3..5, extra 2..15
{friend} has {few} {stamps}. {name} has {extra} more than {times} times as many {stamps} as {friend}.
{name} owns {extra} more than {times} times as many {stamps} as {friend}, who owns {few}.
? How many {stamps} do they have together?
? How many {stamps} do the two of them have in total?
= Multiplying {friend}'s number by {times} gives [many = times * few] {stamps}.
= So {name} has [own = many + extra] {stamps}.
= Together they have [total = own + few] {stamps}.

bulk: count 4..12, single 3..9, saved 2..5, sets 2..5, price = count * single - saved
One {good} costs ${single}, but a set of {count} {goods} costs only ${price}. {name} buys {sets} sets.
{Goods} are sold for ${single} each or in sets of {count} for ${price}. {name} takes {sets} sets.
? How much money does {he} save by not buying the {goods} one by one?
? How many dollars does {name} save compared with buying single {goods}?
= Bought one by one, {count} {goods} cost [singles = count * single] dollars.
= Each set saves [saved = singles - price] dollars.
= In total {name} saves [total = sets * saved] dollars.

rate: pace 3..25, hours 2..6, later 7..12, made = pace * hours
A worker packs {made} {boxes} of {fruits} in {hours} hours.
In {hours} hours, a team on a farm packs {made} {boxes} of {fruits}.
? At the same rate, how many {boxes} can be packed in {later} hours?
? If the work goes on at this speed, how many {boxes} are packed in {later} hours?
= Each hour, [pace = made / hours] {boxes} are packed.
= In {later} hours, [packed = later * pace] {boxes} are packed.

savings: start 10..60, weekly 6..15, weeks 6..15, price = start + weekly * weeks
{name} wants a {desk} that costs ${price}. {He} already has ${start} and saves ${weekly} every week.
A {desk} costs ${price}. {name} has ${start} and puts ${weekly} aside every week to buy it.
? How many weeks will it take until {he} can buy it?
? After how many weeks can {name} buy the {desk}?
= {name} still needs [missing = price - start] dollars.
= That takes [weeks = missing / weekly] weeks.

stops: start 20..45, off 3..9, on 2..9, later 3..8
A {bus} leaves the station with {start} passengers. At the first stop {off} of them get off and {on} people get on.
There are {start} passengers on a {bus}. At the next stop {off} of them leave, and {on} new ones get on.
? At the stop after that, {later} passengers get off. How many are still on board?
? Then {later} more get off at the following stop. How many passengers are on the {bus} now?
= When {off} passengers get off, [rest = start - off] stay.
= With the {on} new ones, there are [full = rest + on] passengers.
= After the last stop, there are [left = full - later] passengers.

average: mean 12..40, a 2..9, b 2..8, first = mean - a, second = mean + b, third = mean + a - b
{name} sells {first} {goods} on Friday, {second} on Saturday and {third} on Sunday.
On three days at {market}, {name} sells {first}, {second} and {third} {goods}.
? What is the average number of {goods} sold per day?
? How many {goods} does {name} sell per day on average?
= In three days {name} sells [total = first + second + third] {goods}.
= The average is [mean = total / 3] {goods} per day.

growth: start 10..40, weekly 2..9, weeks 3..8, more 2..9, end = start + weekly * weeks
A {sunflower} is {start} centimeters tall, and {weeks} weeks later it is {end} centimeters tall.
{name} measures a {sunflower}. It is {start} centimeters tall at first and {end} centimeters after {weeks} weeks.
? It keeps growing at the same rate. How tall is it, in centimeters, after {more} more weeks?
? If it grows by the same amount every week, how many centimeters tall is it {more} weeks after that?
= In {weeks} weeks it grows [grown = end - start] centimeters.
= That is [weekly = grown / weeks] centimeters a week.
= In {more} more weeks it grows [extra = more * weekly] centimeters.
= Then it is [tall = end + extra] centimeters tall.

tickets: adults 2..9, fare 9..20, cheap 4..8, kids 3..20, paid = adults * fare + kids * cheap
Tickets for {museum} cost ${fare} for an adult and ${cheap} for a child. A group pays ${paid} in total.
A group pays ${paid} to visit {museum}. An adult ticket costs ${fare}, and a child ticket costs ${cheap}.
? There are {adults} adults in the group. How many children are there?
? If {adults} of the visitors are adults, how many are children?
= The adults pay [grown = adults * fare] dollars.
= That leaves [rest = paid - grown] dollars for the children.
= So there are [kids = rest / cheap] children.

trees: gap 4..20, gaps 6..30, price 4..15, length = gap * gaps
A road is {length} meters long. On one side there is a {tree} every {gap} meters, with one at each end.
Along a path of {length} meters, there is a {tree} every {gap} meters, from its very start to its very end.
? Each {tree} costs ${price}. How much do they cost in total?
? How much do all the {trees} cost at ${price} each?
= There are [gaps = length / gap] gaps between the {trees}.
= So there are [count = gaps + 1] {trees}.
= They cost [cost = count * price] dollars.
"""
